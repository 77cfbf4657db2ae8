"""What came of it: rows kept as JSON, and what is read off them, tables, figures, changes.

The page's table lies between two markers and is only ever written from such a file.
"""

from .older import compare, require_same_machine
from .results import RESULTS, load, save
from .table import report

__all__ = ["RESULTS", "compare", "load", "report", "require_same_machine", "save"]
