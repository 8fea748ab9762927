"""Build hook: makes the imports of the flat repository fit the nested wheel.

In the repository `costmodels`, `search` and `examples` are top-level packages. A wheel that installed them as such would be
shadowed by a user's own `search.py`, so pyproject.toml nests them as `autoshard._costmodels`, `autoshard._search` and
`autoshard.examples` (`sources`), and this hook rewrites exactly the statements `from costmodels... import`,
`from search... import` and `from examples... import`.
"""

import ast
import re
import tempfile
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NESTED = {"costmodels": "autoshard._costmodels", "search": "autoshard._search", "examples": "autoshard.examples"}


class NestPackages(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version, build_data):
        if version == "editable":
            return
        self.rewritten = tempfile.TemporaryDirectory()
        for number, file in enumerate(self.build_config.builder.recurse_included_files()):
            if file.path.endswith(".py"):
                source = Path(file.path).read_bytes().decode()
                nested = nest_imports(source, file.relative_path)
                if nested != source:
                    copy = Path(self.rewritten.name, f"{number}.py")
                    copy.write_bytes(nested.encode())
                    build_data["force_include"][str(copy)] = file.distribution_path

    def finalize(self, version, build_data, artifact_path):
        if version != "editable":
            self.rewritten.cleanup()


def nest_imports(source: str, filename: str) -> str:
    """`source` with `from search.x import y` turned into `from autoshard._search.x import y`, line for line."""
    lines = source.split("\n")  # as the parser counts them; splitlines() also breaks at form feeds
    for node in ast.walk(ast.parse(source, filename)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] in NESTED for alias in node.names):
            raise SyntaxError(f"{filename}:{node.lineno}: write `from ... import`, which the wheel can nest")
        if isinstance(node, ast.ImportFrom) and node.level == 0 and str(node.module).split(".")[0] in NESTED:
            line = lines[node.lineno - 1]
            name = str(node.module).split(".")[0]
            lines[node.lineno - 1] = re.sub(rf"\bfrom\s+{name}\b", f"from {NESTED[name]}", line, count=1)
    return "\n".join(lines)
