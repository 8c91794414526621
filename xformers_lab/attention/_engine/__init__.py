"""What several attention mechanisms run on. Nothing here knows of a mechanism; what one alone needs stands in its file.

softmax.py         the masked softmax, and the value of a masked score
dense.py           softmax attention by definition, for references
products.py        matrix products and inverses with gradients of their own; blocks.py cuts an axis into blocks
pattern.py         which keys a query may see, by position; random_blocks.py: those drawn at random
algebra.py         combines patterns; order.py reorders positions
block_sparse/      softmax attention over a pattern, touching only its live blocks
query_blocks.py    all keys, one block of queries at a time, for weights and maps that are no plain softmax
by_content.py      queries grouped by the block of keys that they chose
windows.py slots.py landmarks.py    keys pooled, a few learned slots, low rank through landmarks
linear/            sums over features of keys, and chunked recurrences
fourier.py         transforms, and causal convolutions as long as the sequence
heads.py           how heads and samples are mapped, in a batch or in a loop
kernels.py         which kernel of an accelerator runs a call, if any; asked.py: what it is asked
fused.py           cuDNN's, of NVIDIA
ring.py            positions that devices share out
"""
