"""The public conformance kit: what a plugin author runs in their own tests."""

from paretoc.compiler.testing import check_encoding, check_pass

__all__ = ["check_encoding", "check_pass"]
