import pytest

from composer_replication.errors import ConfigError
from composer_replication.planner.hardware import GPUS, check_count, find_gpu, parse_gpu


def test_the_table_holds_every_card_of_the_price_list_and_three_local_ones():
    assert list(GPUS) == [
        *("T4", "L4", "A10", "L40S", "A100-40GB", "A100-80GB", "RTX-PRO-6000"),
        *("H100", "H200", "B200", "B300", "RTX-3090", "RTX-4090", "RTX-5090"),
    ]


def test_no_card_offers_the_bytes_printed_on_its_box():
    for gpu in GPUS.values():
        sold_gib = gpu.memory_gb * 1e9 / 2**30
        # Sizes are named in GB or GiB as the maker likes, and ECC and the driver take their part.
        assert 0.9 * sold_gib < gpu.capacity_gib < gpu.memory_gb


def test_only_the_t4_has_no_bf16():
    assert [gpu.name for gpu in GPUS.values() if not gpu.has_bf16] == ["T4"]


def test_the_local_5090_computes_what_was_measured_and_not_what_the_note_says():
    assert 180 <= find_gpu("RTX-5090").bf16_tflops <= 240


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("l4", "L4"),
        ("A100", "A100-40GB"),
        ("a100-80gb", "A100-80GB"),
        ("A10G", "A10"),
        ("H100!", "H100"),
        ("B200+", "B200"),
        ("NVIDIA GeForce RTX 5090", "RTX-5090"),
        ("rtx4090", "RTX-4090"),
        ("3090", "RTX-3090"),
        ("RTX PRO 6000", "RTX-PRO-6000"),
    ],
)
def test_a_card_is_found_under_the_names_people_write(text, name):
    assert find_gpu(text).name == name


def test_an_unknown_card_is_refused_and_never_guessed():
    with pytest.raises(
        ConfigError,
        match=r"no GPU 'L5'.*neither its memory nor its price is known. Known: A10, A100",
    ):
        find_gpu("L5")


def test_a_request_holds_the_count_and_the_pin():
    request = parse_gpu("h100!:2")
    assert (request.gpu.name, request.num_gpus, request.is_pinned) == ("H100", 2, True)
    assert parse_gpu("L4").num_gpus == 1


@pytest.mark.parametrize("text", ["H100:x", "H100:0", "H100:-1", "H100:", "H100:1.5"])
def test_a_count_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="must be a whole number of at least 1"):
        parse_gpu(text)


@pytest.mark.parametrize(("name", "count"), [("A10", 5), ("H100", 9), ("L4", 0)])
def test_a_count_that_no_machine_has_is_refused(name, count):
    with pytest.raises(ConfigError, match=rf"{count} x {name} is not one machine"):
        check_count(find_gpu(name), count)
