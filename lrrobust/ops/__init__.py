"""The local relation op: one public function, several backends that agree with its reference."""

from lrrobust.ops.local_relation import local_relation

__all__ = ["local_relation"]
