"""What the routers of a model route: the kinds of tokens of a document, and two pictures of it."""

from colt5dist.pretrained.routing.document import DocumentRouting, document_routing
from colt5dist.pretrained.routing.pictures import draw_kinds, draw_map
from colt5dist.pretrained.routing.token_kinds import KINDS, token_kinds, token_texts

__all__ = [
    "KINDS",
    "DocumentRouting",
    "document_routing",
    "draw_kinds",
    "draw_map",
    "token_kinds",
    "token_texts",
]
