"""A repository in memory: what each tool does once its call was accepted."""

from collections.abc import Mapping

from composer_replication.environments.protocol import ToolError


class SimulatedRepository:
    """Path -> text, and which paths were read; one per episode.

    Example: `SimulatedRepository({"src/a.py": "red"}).run({"tool": "read", "path": "src/a.py"})`
    -> `"red"`.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = dict(files)
        self.read_paths: set[str] = set()

    def run(self, call: Mapping[str, str]) -> str:
        """Carry out an old-convention call and say what came of it.

        Raises:
            ToolError: kind `not_found`, without an example: the form of the call is right.
        """
        match call["tool"]:
            case "read":
                text = self._text_at(call["path"])
                self.read_paths.add(call["path"])
                return text
            case "write":
                self.files[call["path"]] = call["text"]
                return "ok: written"
            case "edit":
                self.files[call["path"]] = f"{self._text_at(call['path'])} {call['text']}"
                return "ok: edited"
            case "list":
                return self._list(call["path"])
            case "search":
                return self._search(call["text"])
            case "test":
                self._text_at(call["path"])
                return "ok: 3 passed"
            case "delete":
                self._text_at(call["path"])
                del self.files[call["path"]]
                return "ok: deleted"
            case "move":
                text = self._text_at(call["path"])
                del self.files[call["path"]]
                self.files[f"{call['to']}/{call['path'].rpartition('/')[2]}"] = text
                return "ok: moved"
            case tool:
                raise AssertionError(f"no tool {tool!r}: calls are checked before they run")

    def _text_at(self, path: str) -> str:
        if path not in self.files:
            raise ToolError("not_found", "There is no such file.")
        return self.files[path]

    def _list(self, folder: str) -> str:
        prefix = f"{folder.rstrip('/')}/"
        names = [path.removeprefix(prefix) for path in self.files if path.startswith(prefix)]
        if not names:
            raise ToolError("not_found", "There is no such folder.")
        return ", ".join(sorted(names))

    def _search(self, text: str) -> str:
        paths = [path for path, content in self.files.items() if text in content]
        if not paths:
            raise ToolError("not_found", "No file holds that text.")
        return ", ".join(sorted(paths))
