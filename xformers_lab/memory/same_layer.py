from xformers_lab.memory.xl import Xl


class SameLayer(Xl):
    """ERNIE-Doc's enhanced recurrence: every layer also attends to what it gave itself of earlier segments (Ding et
    al., 2020, arXiv 2012.15688).

        source = [stop_gradient(m); h]     (B, M + T, D), keys and values of a layer whose input is h (B, T, D)
        m'     = the last M rows of [m; layer(h)]

    In memory=xl m are earlier inputs of the layer, which know M tokens more with every layer below. What the layer gave
    knows what it had looked at itself, so that even the first layer reaches back without an end, like a recurrent
    network. It costs what memory=xl costs. The paper uses it alone for language models; its retrospective feed, which
    would tell a decoder the tokens that it is asked for, is depth=retrospective, of an encoder.

    Options:
        length: remembered states M per layer (none: as many as a segment has)
    """

    of_outputs = True
