"""What libraries say stays out of a verb's output only where it is no news."""

import logging

from composer_replication.experiments.quiet_libraries import quiet_libraries

MISSING = "There were missing keys in the checkpoint model loaded: {}."


def said(caplog, *keys):
    """Whether a trainer's warning of these missing weights is heard."""
    log = logging.getLogger("transformers.trainer")
    with caplog.at_level(logging.WARNING, logger=log.name):
        log.addHandler(caplog.handler)
        caplog.clear()
        log.warning(MISSING.format(list(keys)))
        log.removeHandler(caplog.handler)
    return bool(caplog.records)


def test_a_tied_head_that_no_checkpoint_holds_is_no_news(caplog):
    with quiet_libraries():
        with quiet_libraries():
            pass
        assert not said(caplog, "lm_head.weight")
        assert said(caplog, "lm_head.weight", "model.norm.weight")
        assert said(caplog, "model.layers.0.mlp.up_proj.weight")
    assert said(caplog, "lm_head.weight")


def test_warnings_are_heard_again_after_an_error(caplog):
    try:
        with quiet_libraries():
            raise KeyError
    except KeyError:
        assert said(caplog, "lm_head.weight")
