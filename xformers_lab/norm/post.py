from xformers_lab.norm import Norm


class Post(Norm):
    """Post-LN: n(x + f(x)), as in the original Transformer (Vaswani et al., 2017, arXiv 1706.03762).

    Options:
        normaliser: a file of norm/normaliser
    """

    def after(self, x, y, rows):
        return self.normalise(x + y, rows)
