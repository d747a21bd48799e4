"""Results as Markdown."""

from test_pages import report_of

from hf_guidance.experiments.report import comparison_rows
from hf_guidance.experiments.results_page import block_of, losses_in_words, page_of, table_and_gains, times_in_words


def test_a_block_has_command_table_rates_and_machine():
    block = block_of(report_of({0: 1.0}))
    assert block.startswith("```sh\naccelerate launch x.py\n```\n")
    assert "Rates tried alone, validation accuracy: 0.1: 50.0 %. cpu: C, 2 threads; Python 3, torch 2" in block
    assert "\n\n- guided − alone, equal steps, test: +1.0 points (seeds 0: +1.0)\n" in block


def test_a_block_states_the_versions_that_made_the_runs_and_not_only_those_of_today():
    report = report_of({0: 1.0, 1: 2.0})
    assert block_of(report).endswith("; Python 3, torch 2, transformers 5, accelerate 1.\n")
    for run in report["runs"]:
        run["environment"] = report["environment"] | {"torch": f"1.{run['seed']}", "hf_guidance": "0.1"}
    assert block_of(report).endswith("; Python 3, torch 1.0 and 1.1, transformers 5, accelerate 1, hf_guidance 0.1.\n")


def test_without_gains_nothing_stands_between_table_and_machine():
    report = report_of({0: 1.0}) | {"differences": [], "learning_rate_search": []}
    assert " |\n\ncpu: C, 2 threads" in block_of(report)


def test_runs_that_are_compared_on_validation_data_have_no_column_of_the_test():
    report = report_of({0: 1.0})
    rows, task = comparison_rows(report["runs"]), report["task"]
    assert "test accuracy" in table_and_gains(rows, [], task)
    found = table_and_gains(rows, report["differences"], task | {"data": "validation"})
    assert "test" not in found
    assert "- guided − alone, equal steps, validation: +1.0 points" in found


def test_a_page_names_task_and_recipe_and_says_what_was_cut():
    report = report_of({0: 1.0}) | {"recipe": "which_prior"}
    report["task"]["name"] = "images"
    page = page_of(report)
    assert page == f"# images: which_prior\n\n{block_of(report)}"
    assert page_of(report | {"command_is_cut": True}).startswith(page)
    assert "without what belongs to this machine" in page_of(report | {"command_is_cut": True})
    assert "```sh" not in page_of(report | {"command": ""})


def test_times_and_losses_at_the_end_are_said_where_they_are_known():
    guided = {"guide": {"architecture": "G"}, "training": [{"loss": 2.0}, {"loss": 0.25}], "curve": [{"loss": 0.5}]}
    runs = [
        {"run": "guided", "seed": 0, "seconds": 10.0, **guided},
        {"run": "guided", "seed": 1, "seconds": 20.0, **guided},
        {"run": "alone_equal_time", "seed": 0, "seconds": 9.0, "guide": None},
        {"run": "alone_equal_time", "seed": 1, "seconds": 22.0, "guide": None},
    ]
    assert times_in_words(runs) == (
        "The longer baseline had 1.00 times the time of the slowest guided run, 0.90 to 1.10. "
    )
    assert losses_in_words(runs) == "Task loss at the end, training and validation: guided 0.25, 0.5. "
    assert times_in_words(runs[:2]) == losses_in_words(runs[2:]) == ""
