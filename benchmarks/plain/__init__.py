"""The networks of Open-Sora 1.2 written plainly, from papers and formulas: eager layers one after the other.

What they compute is what `opensora.models` computes, from the same state dicts; `tests/speed/test_plain.py` holds one
against the other. They exist to be measured against, so nothing in them is there for speed, and nothing is slow on
purpose: no operation is fused with another, no padding is left out, nothing is kept from one step to the next. (The
formulas of `tests/parity`, in float64 and for one head of one frame at a time, are for comparing numbers alone.)
"""
