from xformers_lab.size import Size


def none(size: Size) -> None:
    """No memory: every sequence stands alone."""
