from xformers_lab.nn.size import Size


def none(size: Size) -> None:
    """No memory: every sequence stands alone."""
