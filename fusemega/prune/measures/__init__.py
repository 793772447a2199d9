"""How important a block is: the measures that the search by perplexity is compared with.

rank.py                 the order that a measure of one pass gives
streams.py              what blocks read and give, block by block, in one pass of the whole model
block_influence.py      1 - cosine of what a block (or layer) reads and gives (ShortGPT)
relative_magnitude.py   how large what it adds is
angular_distance.py     contiguous layers whose input and output point in about the same direction (PruneMe)
random_order.py         no measure: a draw
js_divergence.py        of the next-token distributions with and without the block; searched like perplexity
"""
