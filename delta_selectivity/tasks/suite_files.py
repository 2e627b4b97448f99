"""The classification tasks of sae-probes 0.4.2: their names, families, and groupings of rows.

    find_task("56")                       # '56_wikidatasex_or_gender'; also found by its name without the number
    family_of("117_us_state_FL")          # 'places'
    GROUPINGS[grouping_of("117_us_state_FL")]

The suite of Kantamneni et al. 2025 (arXiv 2502.16681) is the 113 binary files; 23 more have 3 to 64 classes. The other
19 files are regression data. The name of a task is that of its file, with `_` for spaces.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable

_FAMILIES = {
    "people": (
        "5_hist_fig_ismale, 6_hist_fig_isamerican, 7_hist_fig_ispolitician, 56_wikidatasex_or_gender, "
        "57_wikidatais_alive, 58_wikidatapolitical_party, 59_wikidata_occupation_isjournalist, "
        "60_wikidata_occupation_isathlete, 61_wikidata_occupation_isactor, 62_wikidata_occupation_ispolitician, "
        "63_wikidata_occupation_issinger, 64_wikidata_occupation_isresearcher, 108_athlete_sport, "
        "154_athlete_sport_football, 155_athlete_sport_basketball, 156_athlete_sport_baseball"
    ),
    "places": (
        "10_nyc_borough, 13_us_state, 14_us_timezone, 17_world_country, 114_nyc_borough_Manhattan, "
        "115_nyc_borough_Brooklyn, 116_nyc_borough_Bronx, 117_us_state_FL, 118_us_state_CA, 119_us_state_TX, "
        "120_us_timezone_Chicago, 121_us_timezone_New_York, 122_us_timezone_Los_Angeles, "
        "123_world_country_United_Kingdom, 124_world_country_United_States, 125_world_country_Italy"
    ),
    "works": "27_art_type, 126_art_type_book, 127_art_type_song, 128_art_type_movie",
    "news": (
        "21_headline_istrump, 22_headline_isobama, 23_headline_ischina, 24_headline_isiran, 25_headline_year, "
        "26_headline_isfrontpage, 97_news_class, 139_news_class_Politics, 140_news_class_Technology, "
        "141_news_class_Entertainment, 161_agnews_0, 162_agnews_1, 163_agnews_2"
    ),
    "questions": (
        "36_sciq_tf, 41_truthqa_tf, 42_temp_sense, 43_temp_cat, 44_phys_tf, 45_context_ans, 46_context_type, "
        "47_reasoning_tf, 54_cs_tf, 55_open_qa, 86_social_iqa, 130_temp_cat_Frequency, 131_temp_cat_Typical Time, "
        "132_temp_cat_Event Ordering, 133_context_type_Causality, 134_context_type_Belief_states, "
        "135_context_type_Event_duration"
    ),
    "ethics": "48_cm_correct, 49_cm_isshort, 50_deon_isvalid, 51_just_is, 52_virtue_is",
    "arithmetic": "37_arith_mc, 38_arith_difficulty, 129_arith_mc_A",
    "phrases": (
        "65_high-school, 66_living-room, 67_social-security, 68_credit-card, 69_blood-pressure, 70_prime-factors, "
        "71_social-media, 72_gene-expression, 73_control-group, 74_magnetic-field, 75_cell-lines, 76_trial-court, "
        "77_second-derivative, 78_north-america, 79_human-rights, 80_side-effects, 81_public-health, "
        "82_federal-government, 83_third-party, 84_clinical-trials, 85_mental-health"
    ),
    "language": (
        "87_glue_cola, 88_glue_mnli, 89_glue_mrpc, 90_glue_qnli, 91_glue_qqp, 136_glue_mnli_entailment, "
        "137_glue_mnli_neutral, 138_glue_mnli_contradiction"
    ),
    "sentiment": (
        "92_glue_sst2, 102_twt_emotion, 111_yelp_data, 112_amzn_rev, 113_movie_sent, 148_twt_emotion_worry, "
        "149_twt_emotion_happiness, 150_twt_emotion_sadness, 157_amazon_5star"
    ),
    "quality": (
        "94_ai_gen, 95_toxic_is, 96_spam_is, 100_news_fake, 105_click_bait, 106_hate_hate, 107_hate_offensive, "
        "110_aimade_humangpt3"
    ),
    "topics": (
        "98_cancer_cat, 99_sci_cat, 101_disease_class, 103_it_tick, 142_cancer_cat_Thyroid_Cancer, "
        "143_cancer_cat_Lung_Cancer, 144_cancer_cat_Colon_Cancer, 145_disease_class_digestive system diseases, "
        "146_disease_class_cardiovascular diseases, 147_disease_class_nervous system diseases, "
        "151_it_tick_HR Support, 152_it_tick_Hardware, 153_it_tick_Administrative rights"
    ),
    "code": "158_code_C, 159_code_Python, 160_code_HTML",
}
_REGRESSION = (
    "2_hist_fig_birthyear, 3_hist_fig_deathyear, 4_hist_fig_age, 8_nyc_lat, 9_nyc_long, 11_us_lat, 12_us_long, "
    "15_us_population, 16_us_density, 18_world_latitude, 19_world_longitude, 20_world_pageviews, 28_art_year, "
    "29_art_pageviews, 30_book_length, 39_arith_infix, 40_arith_rpn, 93_glue_stsb, 109_ball_ws"
)
_MULTI_CLASS = {10, 13, 14, 17, 25, 27, 37, 38, 43, 45, 46, 55, 86, 88, 97, 98, 99, 101, 102, 103, 108, 111, 112}
_IN_WIKIDATA = {*range(56, 65), 108}  # the files of the five Wikidata tasks
_ONE_VS_REST = {*range(114, 157)}  # one class of a multi-class file against rows of the others
_ONE_SOURCE = ("agnews", "cm", "code", "hate", "headline", "hist_fig", "wikidata_occupation")
"""Name prefixes of tasks whose texts are from one collection, in addition to `_ONE_VS_REST`."""
_DUPLICATES = {38, 112}  # 37 and 111 have the same rows

GROUPINGS = {
    "person": "the text's last two words",
    "name": "the name up to a comma or parenthesis",
    "question": "the text up to a line break, `|`, `[SEP]` or `(A)`: the question, passage or first sentence",
    "text": "the text",
}
"""The part of the text that the rows of a group share, compared by letters and digits only."""
_BY_FAMILY = {
    "people": "person",
    "places": "name",
    "works": "name",
    "questions": "question",
    "ethics": "question",
    "arithmetic": "question",
    "language": "question",
}


def name_of(stem: str) -> str:
    """Return the name of the task in a file: the file's name without spaces."""
    return stem.replace(" ", "_")


STEMS = {name_of(stem): stem for stems in _FAMILIES.values() for stem in stems.split(", ")}
"""Task -> name of its file, without the suffix."""
_FAMILY = {name_of(stem): family for family, stems in _FAMILIES.items() for stem in stems.split(", ")}
FAMILIES = tuple(_FAMILIES)


def number_of(name: str) -> int:
    """Return a task's number, the prefix of its file name."""
    return int(name.partition("_")[0])


ALL = tuple(sorted(STEMS, key=number_of))
"""The 136 tasks with classes, ordered by number."""
SUITE = tuple(name for name in ALL if number_of(name) not in _MULTI_CLASS)
"""The 113 binary tasks."""
OUTSIDE_WIKIDATA = tuple(
    name for name in ALL if number_of(name) not in _IN_WIKIDATA | _ONE_VS_REST | _DUPLICATES
)  # fmt: skip
"""The tasks that, with the five Wikidata tasks, have every question once; multi-class tasks are one-vs-rest."""
_REGRESSION_TASKS = tuple(map(name_of, _REGRESSION.split(", ")))


def _spellings(name: str) -> tuple[str, ...]:
    number, _, tag = name.casefold().partition("_")
    return number, tag, f"{number}_{tag}"


_FOUND = {spelling: name for name in (*ALL, *_REGRESSION_TASKS) for spelling in _spellings(name)}


def find_task(spelling: str) -> str | None:
    """Return the task with this number, name or name without number, ignoring case; None if there is none."""
    return _FOUND.get(name_of(spelling).casefold())


def is_regression(name: str) -> bool:
    """Return whether the labels of a file are numbers, which classification probes do not support."""
    return name in _REGRESSION_TASKS


def similar(part: str) -> Iterable[str]:
    """Return a few tasks whose names contain `part`."""
    part = name_of(part).casefold()
    return itertools.islice((name for name in ALL if len(part) > 3 and part in name.casefold()), 3)


def family_of(name: str) -> str:
    """Return the family of a task."""
    return _FAMILY[name]


def source_of(name: str) -> str:
    """Return the source of a task's texts; scores of tasks with the same source tend to be similar."""
    tag = name.partition("_")[2]
    multi_class = [other.partition("_")[2] for other in ALL if number_of(other) in _MULTI_CLASS]
    return next((begin for begin in (*multi_class, *_ONE_SOURCE) if tag == begin or tag.startswith(f"{begin}_")), tag)


def grouping_of(name: str) -> str:
    """Return the grouping of a task's rows: a name of `GROUPINGS`."""
    if name.partition("_")[2].startswith("hist_fig"):
        return "name"
    return _BY_FAMILY.get(family_of(name), "text")
