"""The sparse model as files anyone can open, re-opened and checked before they count as written."""

from sclcore.export.compact import load_compact, save_compact
from sclcore.export.files import ExportError
from sclcore.export.graphs import save_onnx, save_program
from sclcore.export.huffman import NothingSmaller, load_huffman, open_huffman, save_huffman
from sclcore.export.plain import budgets_csv, save_sparse_model, save_state_dict
from sclcore.export.semi_structured import load_semi_structured

__all__ = [
    "ExportError",
    "NothingSmaller",
    "budgets_csv",
    "load_compact",
    "load_huffman",
    "load_semi_structured",
    "open_huffman",
    "save_compact",
    "save_huffman",
    "save_onnx",
    "save_program",
    "save_sparse_model",
    "save_state_dict",
]
