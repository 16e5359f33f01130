"""How tokens are routed: routers, their learned vectors, gathering and scattering, decisions kept for recomputation."""
