"""Settings in a YAML file, as `tune -c FILE` and `pretrain -c FILE` read them."""

from __future__ import annotations

import functools
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..fields import shorten
from ..files import read_text
from .run_settings import RunSettings, from_mapping
from .settings import Settings

if TYPE_CHECKING:
    import yaml


def read_settings(path: Path, kind: type[RunSettings] = Settings) -> dict[str, Any]:
    """The settings of a `kind` that a YAML file names, checked by name and type.

    Raises OptionError naming the file and the key.
    """
    import yaml

    try:
        value = yaml.load(read_text(path), _yaml_loader())
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}; name a YAML file") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise OptionError(f"{path} is not valid YAML: it is nested too deeply") from error
    except _YAML_ERRORS as error:
        raise OptionError(f"{path} is not valid YAML: a value is none of the type that it looks like") from error
    if not isinstance(value, dict):
        raise OptionError(f"{path} holds no settings; write lines such as `data: my.jsonl`")
    return from_mapping(value, str(path), kind)


# Of PyYAML's constructors, for a value that does not fit its tag or form: `!!bool x`, `2024-99-99`.
_YAML_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@functools.cache
def _yaml_loader() -> type[yaml.SafeLoader]:
    """A safe loader that reads numbers as YAML 1.2 and people do, 1e-4 as one and 8:30 as none, and no key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = next((key for key, count in keys.items() if count > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"{shorten(twice, quote=False)} is given twice")
            return super().construct_mapping(node, deep)

    # Of another class the list would be shared.
    Loader.yaml_implicit_resolvers = {
        first: [rule for rule in rules if rule[0] not in _NUMBERS]
        for first, rules in Loader.yaml_implicit_resolvers.items()
    }
    for tag, pattern in _NUMBERS.items():
        Loader.add_implicit_resolver(tag, re.compile(pattern), list("-+.0123456789"))
    return Loader


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9]*)$",  # 010 is 8 for some and 10 for others
    "tag:yaml.org,2002:float": (
        r"(?i)[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=e))(?:e[-+]?[0-9]+)?$|[-+]?\.(?:inf|nan)$"
    ),
}
