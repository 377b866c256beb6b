"""HAM and sHAM: matrices with few different values as Huffman codewords, in files and products."""

from sclcore.export.huffman.file import (
    NothingSmaller,
    load_huffman,
    open_huffman,
    save_huffman,
)
from sclcore.export.huffman.matrices import Ham, Sham

__all__ = ["Ham", "NothingSmaller", "Sham", "load_huffman", "open_huffman", "save_huffman"]
