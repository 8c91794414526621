from xformers_lab.nn.size import Size


def none(size: Size) -> None:
    """No feed-forward sub-layer: blocks are attention alone (as in the recall models of Zoology, arXiv 2312.04927)."""
