"""CRC-32C (Castagnoli), the checksum of TFRecord, fast enough in NumPy: the standard library has only CRC-32."""

from functools import lru_cache

import numpy as np

_POLYNOMIAL = 0x82F63B78  # bits reversed
_LANE = 128  # bytes of a message that are one lane: all lanes advance together
_MASK_DELTA = 0xA282EAD8


def crc32c(data: bytes) -> int:
    """CRC-32C of `data`, as in RFC 3720."""
    # Starting from all ones is starting from zero with the first four bytes inverted; and from zero, leading zero
    # bytes change nothing. So the message can be cut into lanes of equal length, their number a power of two.
    head = bytes(data[:4])
    if len(head) < 4:
        short = 0xFFFFFFFF
        for byte in head:
            short = _bytewise(short ^ byte)
        return short ^ 0xFFFFFFFF
    lanes = 1 << max(0, -(-len(data) // _LANE) - 1).bit_length()
    padded = np.zeros(lanes * _LANE, np.uint8)
    padded[len(padded) - len(data) :] = np.frombuffer(data, np.uint8)
    padded[len(padded) - len(data) :][:4] ^= 0xFF
    words = padded.view("<u4").reshape(lanes, -1).T
    state = np.zeros(lanes, np.uint32)
    for word in words:
        state = _advance(state ^ word, 4)
    length = _LANE
    while len(state) > 1:
        state = _advance(state[0::2], length) ^ state[1::2]
        length *= 2
    return int(state[0]) ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """The form in which TFRecord stores it: rotated and shifted, so that a sum over sums is no weak one."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _bytewise(state: int) -> int:
    for _ in range(8):
        state = state >> 1 ^ (_POLYNOMIAL if state & 1 else 0)
    return state


def _advance(state: np.ndarray, zeros: int) -> np.ndarray:
    """The states (n,) uint32 after that many zero bytes more."""
    low, high = _tables(zeros)
    return low[state & 0xFFFF] ^ high[state >> 16]


@lru_cache(maxsize=64)
def _tables(zeros: int) -> tuple[np.ndarray, np.ndarray]:
    """Advancing is linear over GF(2): what it makes of each low and each high half of a state, 65,536 entries each."""
    columns = _columns(zeros)
    tables = []
    for half in (columns[:16], columns[16:]):
        table = np.zeros(1, np.uint32)
        for column in half:
            table = np.concatenate([table, table ^ column])
        tables.append(table)
    return tables[0], tables[1]


@lru_cache(maxsize=64)
def _columns(zeros: int) -> tuple[np.uint32, ...]:
    """What becomes of each of the 32 bits of a state; `zeros` is a power of two."""
    if zeros == 1:
        return tuple(np.uint32(_bytewise(1 << bit)) for bit in range(32))
    half = _columns(zeros // 2)
    return tuple(_apply(half, int(column)) for column in half)


def _apply(columns: tuple[np.uint32, ...], state: int) -> np.uint32:
    result = np.uint32(0)
    for bit in range(32):
        if state >> bit & 1:
            result ^= columns[bit]
    return result
