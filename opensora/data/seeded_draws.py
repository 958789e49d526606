"""The first numbers of numpy's default generator for many seeds at once.

Buckets draw, for every clip, from a generator of its own: `numpy.random.default_rng(seed)`. Making a million of them
takes a minute, so its arithmetic is written out here for arrays: numpy's `SeedSequence` spreads the seed over 256 bits,
which start a PCG64 (O'Neill, 2014; 128-bit state, XSL-RR output). numpy promises that neither will change.
"""

import numpy as np

_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_PCG_HIGH, _PCG_LOW = np.uint64(0x2360ED051FC65DA4), np.uint64(0x4385DF649FCCF645)
_HALF, _LOW_HALF = np.uint64(32), np.uint64(0xFFFFFFFF)
_POOL_WORDS = 4

_Wide = tuple[np.ndarray, np.ndarray]  # 128 bits: the upper and the lower 64


def first_uniforms(seeds: np.ndarray, count: int) -> np.ndarray:
    """What `default_rng(seed).random(count)` returns for each seed.

    Args:
        seeds: (n,) integers from 0 to 2^64 - 1.
        count: numbers of each generator.

    Returns:
        float64 (count, n) in [0, 1).
    """
    words = _seed_words(np.asarray(seeds).astype(np.uint64))
    start = (words[0], words[1])
    # The stream's number, made odd: shifted left by one bit, and one.
    one, top = np.uint64(1), np.uint64(63)
    increment = ((words[2] << one) | (words[3] >> top), (words[3] << one) | one)
    state = _step(_add(increment, start), increment)
    numbers = []
    for _ in range(count):
        state = _step(state, increment)
        rotation, folded = state[0] >> np.uint64(58), state[0] ^ state[1]
        rotated = (folded >> rotation) | (folded << ((np.uint64(64) - rotation) & top))
        numbers.append((rotated >> np.uint64(11)) * 2.0**-53)
    return np.array(numbers).reshape(count, len(seeds))


def _seed_words(seeds: np.ndarray) -> list[np.ndarray]:
    """`SeedSequence(seed).generate_state(4, uint64)`, for each seed."""
    zeros = np.zeros(len(seeds), np.uint32)
    entropy = [(seeds & _LOW_HALF).astype(np.uint32), (seeds >> _HALF).astype(np.uint32), zeros, zeros]
    constants = _constants(_INIT_A, _MULT_A)
    pool = [_hash(word, *next(constants)) for word in entropy]
    for source in range(_POOL_WORDS):
        for target in range(_POOL_WORDS):
            if source != target:
                mixed = _MIX_LEFT * pool[target] - _MIX_RIGHT * _hash(pool[source], *next(constants))
                pool[target] = mixed ^ (mixed >> np.uint32(16))
    constants = _constants(_INIT_B, _MULT_B)
    words = [_hash(pool[i % _POOL_WORDS], *next(constants)).astype(np.uint64) for i in range(2 * _POOL_WORDS)]
    return [low | (high << _HALF) for low, high in zip(words[::2], words[1::2], strict=True)]


def _constants(constant: int, multiplier: int):
    """Pairs of a hash's constant and the next one."""
    while True:
        following = constant * multiplier & 0xFFFFFFFF
        yield np.uint32(constant), np.uint32(following)
        constant = following


def _hash(words: np.ndarray, constant: np.uint32, following: np.uint32) -> np.ndarray:
    hashed = (words ^ constant) * following
    return hashed ^ (hashed >> np.uint32(16))


def _step(state: _Wide, increment: _Wide) -> _Wide:
    """state * multiplier + increment, modulo 2^128."""
    high, low = state
    carried = _upper_product(low, _PCG_LOW) + high * _PCG_LOW + low * _PCG_HIGH
    return _add((carried, low * _PCG_LOW), increment)


def _add(a: _Wide, b: _Wide) -> _Wide:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]), low


def _upper_product(a: np.ndarray, b: np.uint64) -> np.ndarray:
    """The upper 64 bits of the product."""
    a_high, a_low, b_high, b_low = a >> _HALF, a & _LOW_HALF, b >> _HALF, b & _LOW_HALF
    middle = a_high * b_low + (a_low * b_low >> _HALF)
    other = a_low * b_high + (middle & _LOW_HALF)
    return a_high * b_high + (middle >> _HALF) + (other >> _HALF)
