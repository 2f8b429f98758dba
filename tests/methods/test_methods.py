from abkd_fast import methods
from abkd_fast.config.methods import METHODS, WITHOUT_TEACHER
from abkd_fast.methods.base import Method


def test_configurations_know_every_method_and_which_need_no_teacher():
    assert tuple(methods.METHODS) == METHODS
    assert all(issubclass(method, Method) for method in methods.METHODS.values())
    assert tuple(name for name, method in methods.METHODS.items() if not method.needs_teacher) == WITHOUT_TEACHER
