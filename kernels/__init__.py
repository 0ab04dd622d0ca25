"""The maths: one op family a file, each with its formula and a plain torch path.

Shape legend, used by every file here:
    T tokens of a step, B sequences, H query heads, K key/value heads, G = H / K, D head dim
"""
