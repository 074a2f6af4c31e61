"""The member ``PREFIX_MEMORY`` of PEFT's ``PeftType`` enum."""

from __future__ import annotations

from peft.utils.peft_types import PeftType

NAME = "PREFIX_MEMORY"


def add_peft_type(name: str) -> PeftType:
    """Give ``PeftType`` one more member and return it; a second call returns the same one.

    ``register_peft_method`` accepts only names of this enum. The member is made the way the enum makes its own: a
    ``str`` that knows its name and value, known to the enum by both.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


PREFIX_MEMORY = add_peft_type(NAME)
