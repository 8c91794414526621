from xformers_lab.model._transformer import Transformer


class Encoder(Transformer):
    """Every position sees both sides; a sequence is pooled by the mean of its valid positions (BERT without [CLS]).

    Options:
        tied: whether the table of embeddings is the head's matrix, too, where answers are tokens
        pool: what of a sequence the head looks at, of its valid positions; none: the mean
    """
