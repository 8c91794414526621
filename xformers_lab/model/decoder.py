from typing import ClassVar

from xformers_lab.model._transformer import Pool, Transformer


class Decoder(Transformer):
    """A position sees itself and what stands before it; a sequence is pooled by its last valid position (GPT-like).

    Options:
        tied: whether the table of embeddings is the head's matrix, too, where answers are tokens
        pool: what of a sequence the head looks at, of its valid positions; none: the last
    """

    causal = True
    pools: ClassVar[Pool] = "last"
