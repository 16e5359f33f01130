"""What TensorBoard shows of a run: under which tags, with which descriptions, in which charts."""
