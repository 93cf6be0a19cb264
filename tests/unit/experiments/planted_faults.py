"""Plants a fault in the package's own source for one test: an edit, nothing imitated."""

import inspect
import textwrap


def plant(monkeypatch, owner, name, old, new):
    """Replace `old`, which must stand there once, in the source of `owner.name`.

    Args:
        monkeypatch: puts the original back.
        owner: a module or a class.
        name: of the function.
        old: part of its source.
        new: what stands there instead.
    """
    function = inspect.unwrap(inspect.getattr_static(owner, name))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{name} has {source.count(old)} times {old!r}"
    source = source.replace(old, new)
    if inspect.isclass(owner):
        # Outside its class a method has no cell for the short form.
        source = source.replace("super()", f"super({owner.__name__}, self)")
    namespace = dict(function.__globals__)
    exec(compile(source, f"<planted in {name}>", "exec"), namespace)
    monkeypatch.setattr(owner, name, namespace[name])
