"""The catalogue of silent bugs: what has spoilt fine-tuned models elsewhere without a word, and what stops it here.

Numbers are those of the catalogue that the project began with and name the tests (`test_c25_...`). docs/silent-bugs.md
is this table; `python tests/silent_bugs.py` prints it, and test_silent_bugs_map.py holds map, tests and page together.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """bug: in a line. stopped: how it is made impossible, or why it cannot happen yet. tests: "file::function"."""

    bug: str
    stopped: str
    tests: tuple[str, ...] = ()


def bug(bug: str, stopped: str, *tests: str) -> Entry:
    return Entry(bug, stopped, tests)


TRAINING, TEXT = "test_silent_bugs.py", "test_silent_bugs_text.py"
NOT_BUILT = "not built yet: "

CATALOGUE: dict[int, Entry] = {
    # ------------------------------------------------------ loss, masks, templates, packing
    1: bug(
        "Accumulating over n micro-batches makes the update, or the logged loss, n times too large",
        "the items of the whole step are counted before its first backward pass, and every sum is divided by them",
        f"{TRAINING}::test_c01_accumulation_changes_neither_the_update_nor_the_logged_loss",
        "test_engine.py::test_a_step_cut_into_micro_batches_is_the_same_step",
        "test_doctor.py::test_accumulation_changes_nothing",
    ),
    2: bug(
        "Micro-batches of unequal size weigh the same: a mean of means",
        "losses are sums and are divided once, by the items of the step",
        f"{TRAINING}::test_c02_a_step_is_the_mean_over_its_items_and_no_mean_of_means",
        "test_causal_lm.py::test_a_step_cut_into_micro_batches_is_the_same_step",
    ),
    3: bug(
        "The same between ranks: each divides by its own items",
        "counts and gradients are summed over ranks; two processes are held against one",
        "test_ranks.py::test_c03_two_ranks_give_the_weights_of_one_process",
        "test_ranks.py::test_what_is_logged_is_of_the_whole_step",
    ),
    4: bug(
        "The short last step of an epoch is divided as if it were whole",
        "a step is divided by the items it has",
        "test_engine.py::test_c04_the_last_step_of_an_epoch_is_the_mean_of_the_rows_it_has",
        f"{TRAINING}::test_c04_the_short_last_step_of_an_epoch_is_divided_by_what_it_has",
    ),
    5: bug(
        "The loss falls on the question as well as on the answer",
        "the mask follows from which turn a token came from; `check` shows what is learnt between « and »",
        "test_sft.py::test_c05_every_format_learns_the_answer_with_its_end_and_nothing_else",
        "test_sft.py::test_what_is_learnt_is_seen_before_training",
    ),
    6: bug(
        "In a conversation of several turns only the last answer is learnt, or the wrong stretch",
        "every answer is a piece of its own, rendered turn by turn",
        "test_sft.py::test_c06_four_turns_with_a_system_text_learn_both_answers",
        "test_sft.py::test_a_template_of_the_base_is_used_and_its_own_marker_ends_answers",
    ),
    7: bug(
        "A chat template without marks for the answer gives an empty mask",
        "no marks are needed: answers are found by rendering the conversation with and without them",
        f"{TEXT}::test_c07_the_answers_are_found_whatever_marks_the_template_has",
    ),
    8: bug(
        "A row or a step without any label trains on nothing and reports a loss of 0",
        "such rows are left out and counted before the first step; a step that counts no item is an error",
        f"{TEXT}::test_c08_every_row_has_something_to_learn_from",
        f"{TEXT}::test_c08_documents_of_which_nothing_is_predicted_are_left_out_and_counted",
        "test_engine.py::test_a_step_without_anything_to_learn_from_is_an_error",
    ),
    9: bug(
        "Truncation removes the whole answer, or drops the row unseen",
        "rows that do not fit are left out by name and number, or cut so that some answer stays",
        "test_sft.py::test_c09_rows_whose_answer_does_not_fit_are_left_out_or_cut_and_counted",
        "test_sft.py::test_a_row_too_long_keeps_its_start_token_and_some_of_its_answer",
    ),
    10: bug(
        "Truncation removes the end token, and the model never learns to stop",
        "a row that lost its end is counted as cut; of a document in parts the last one has it",
        f"{TEXT}::test_c10_a_row_that_is_not_counted_as_cut_ends_with_its_end_token",
    ),
    11: bug(
        "Where the end token also pads, masking the padding masks the end",
        "padding is known by its place, never by its id",
        "test_sft.py::test_c11_a_padding_token_that_is_the_end_token_hides_no_end",
        "test_sft.py::test_overfitted_on_twenty_rows_it_ends_every_answer",
    ),
    12: bug(
        "The template closes no answer, so no end is ever learnt",
        "the end token is put behind each answer, and that is said",
        f"{TEXT}::test_c12_every_answer_learns_its_end_also_where_the_template_has_none",
    ),
    13: bug(
        "The start token stands twice: once from the template, once from the tokenizer",
        "rendered text is encoded without the tokenizer's own marks",
        f"{TEXT}::test_c13_the_start_token_stands_once_on_every_path",
        f"{TEXT}::test_c13_a_template_that_writes_the_start_token_has_it_once",
    ),
    14: bug(
        "A conversation is rendered otherwise in training than when the model is asked",
        "prompts are the tokens that transformers itself would make; the template is saved with the model",
        "test_sft.py::test_c14_prompt_tokens_are_those_that_transformers_would_serve",
        "test_chat.py::test_it_says_what_predict_says",
    ),
    15: bug(
        "A token reaches over the edge between question and answer, where serving has two",
        "question and answer are encoded apart",
        f"{TEXT}::test_c15_no_token_reaches_over_the_edge_between_question_and_answer",
    ),
    16: bug(
        "What somebody wrote spells a control token and steers the model",
        "turns and documents are encoded as plain text; a classifier reads as a pipeline does, and counts such rows",
        "test_sft.py::test_c16_what_people_write_never_becomes_control_tokens",
        f"{TEXT}::test_c16_texts_that_spell_control_tokens_are_counted",
        "test_causal_lm.py::test_a_document_begins_and_ends_with_its_marks_and_its_own_words_are_no_marks",
    ),
    17: bug(
        "Packed documents see each other",
        "the model itself is asked first, on documents of a self-test; where it leaks, rows are padded and it is said",
        "test_packing.py::test_c17_packed_costs_what_each_document_costs_alone",
        f"{TRAINING}::test_c17_packed_rows_give_the_update_of_padded_ones_under_every_method",
        "test_packing.py::test_a_family_whose_documents_leak_is_told_apart_with_the_reason",
    ),
    18: bug(
        "Positions run on through a packed row",
        "they begin anew with every document, whose first label is off",
        f"{TEXT}::test_c18_positions_begin_anew_with_every_document_of_a_packed_row",
    ),
    19: bug(
        "Labels are shifted twice, or not at all",
        "one function shifts, and every loss over tokens goes through it",
        "test_models.py::test_c19_causal_logprob_shifts_once",
        "test_causal_lm.py::test_the_loss_of_a_row_is_transformers_own_and_long_rows_are_summed_over_windows",
    ),
    20: bug(
        "Class weights are divided out wrongly as soon as a step is cut up",
        "the count of a step is the sum of its weights; held against torch's own weighted loss",
        f"{TRAINING}::test_c20_weights_of_classes_divide_as_torchs_do_however_the_step_is_cut",
        "test_engine.py::test_a_step_cut_into_micro_batches_is_the_same_step",
    ),
    21: bug(
        "A classifier with a single output is trained as a regression on class numbers",
        "a classification task has a logit for each label, whatever the base's configuration says",
        f"{TEXT}::test_c21_two_classes_have_two_logits_also_on_a_base_that_was_a_regression",
        "test_bad_input.py::test_row_40_41_one_class_only_is_refused",
    ),
    22: bug(
        "The head has the default number of outputs and not that of the classes",
        "the labels are read off the training rows and saved by name",
        f"{TEXT}::test_c22_c23_there_are_as_many_logits_as_classes_and_each_has_rows",
        "test_bad_input.py::test_row_37_38_39_labels_unknown_to_training_are_listed_with_rows_and_the_nearest",
    ),
    23: bug(
        "Labels that count from 1 leave class 0 unused",
        "labels are names: ids are given out here and each has rows",
        f"{TEXT}::test_c22_c23_there_are_as_many_logits_as_classes_and_each_has_rows",
    ),
    24: bug(
        "Texts, or answers, run beyond the positions that the model was trained on",
        "rows are cut, divided or left out at that limit and counted; an answer ends there",
        f"{TEXT}::test_c24_no_row_is_longer_than_the_positions_of_the_model_and_what_is_cut_is_said",
        f"{TEXT}::test_c24_an_answer_ends_where_the_positions_of_the_model_end",
        "test_methods.py::test_position_tables_with_a_padding_index_hold_fewer_tokens",
        "test_prompt.py::test_a_text_at_the_limit_is_cut_as_many_tokens_earlier",
        "test_prefix.py::test_a_text_at_the_limit_is_cut_as_many_tokens_earlier",
    ),
    # ------------------------------------------------------------ freezing, adapters, saving
    25: bug(
        "Batch-norm statistics of a frozen trunk drift",
        "batch norms stand in eval mode unless the recipe asks otherwise; frozen tensors are hashed, buffers too",
        "test_matrix.py::test_c25_frozen_stays_bit_equal_buffers_included_and_all_that_trains_moves",
        "test_engine.py::test_batch_norm_statistics_move_only_when_asked",
    ),
    26: bug(
        "Dropout stays on in a frozen trunk, and features are noise",
        "modules in which nothing trains stand in eval mode",
        "test_contracts.py::test_c26_frozen_parts_stand_in_eval_mode_and_batch_norms_always_do",
        f"{TRAINING}::test_c26_a_frozen_trunk_gives_the_same_features_twice",
    ),
    27: bug(
        "An augmented row is kept and seen the same in every epoch",
        "what is kept is the encoded row; chance comes after it and may not change it",
        f"{TRAINING}::test_c27_what_is_kept_of_a_row_is_not_what_chance_made_of_it",
    ),
    28: bug(
        "Layers unfrozen on the way never reach the optimiser",
        "the optimiser is built anew when the trainable set changes",
        "test_layers.py::test_c28_in_each_stage_exactly_the_unfrozen_set_moves",
        "test_layers.py::test_what_is_frozen_has_no_gradient_and_no_optimiser_state",
    ),
    29: bug(
        "Unfreezing resets the optimiser's moments or makes the rate jump",
        "moments are kept by name; new groups are warmed up from where they begin",
        "test_layers.py::test_c29_moments_of_old_groups_go_on_and_those_of_new_ones_begin_at_zero",
        "test_layers.py::test_a_late_group_is_warmed_up_from_its_own_first_step",
    ),
    30: bug(
        "A run killed between stages resumes with the wrong set or no set at all",
        "what trains is a function of progress, replayed before the state is loaded",
        "test_layers.py::test_c30_resumed_in_any_stage_ends_with_the_same_bytes",
    ),
    31: bug(
        "With several rates a weight stands in two groups, or in none",
        "every method's groups are checked to hold each trainable weight once",
        f"{TRAINING}::test_c31_every_weight_that_trains_stands_in_one_group_once",
        "test_contracts.py::test_what_trains_is_float32_includes_what_is_fresh_and_stands_in_one_group",
    ),
    32: bug(
        "Weight decay pulls at norms and biases",
        "decay reaches matrices only",
        "test_engine.py::test_c32_adamw_decays_matrices_only",
        "test_contracts.py::test_what_trains_is_float32_includes_what_is_fresh_and_stands_in_one_group",
    ),
    33: bug(
        "A new head is left out of what is saved, and comes back random",
        "what the checkpoint lacked always trains and is always saved; a new process must answer the same",
        "test_matrix.py::test_c33_a_new_process_gives_the_same_outputs",
        "test_matrix.py::test_the_lines_of_the_card_open_every_result_without_us",
    ),
    34: bug(
        "Embeddings of added tokens do not train, or are not saved",
        "the rows of new tokens train and travel with the adapter; the card's lines make room for them",
        "test_lora.py::test_c34_new_tokens_are_saved_and_opened_by_the_lines_of_the_card",
        "test_lora.py::test_of_the_tables_only_the_rows_of_new_tokens_move",
    ),
    35: bug(
        "Folding or saving tears tied weights apart, and one of them is lost",
        "folded, saved and opened again, the model must answer the same",
        f"{TRAINING}::test_c35_a_table_shared_with_the_head_survives_folding_and_saving",
    ),
    36: bug(
        "An adapter is folded in half precision, or folding spoils the base",
        "folding is done on a copy, in float32",
        f"{TRAINING}::test_c36_a_base_in_half_precision_is_folded_in_float32_and_left_as_it_was",
        "test_contracts.py::test_merged_answers_as_unmerged_or_merging_is_refused",
        "test_merging.py::test_a_fold_that_is_wrong_in_one_weight_is_refused_and_leaves_nothing",
    ),
    37: bug(
        "An adapter trained on a quantised base is folded onto other weights",
        "it goes onto those that the bits stand for, and the proof compares logits",
        "test_quantize.py::test_c37_merging_goes_onto_the_weights_that_the_bits_stand_for",
        "test_quantize.py::test_merging_into_the_four_bits_would_round_the_change_away",
    ),
    38: bug(
        "DoRA's lengths are dropped when it is folded",
        "folded rows have the trained lengths",
        "test_lora.py::test_c38_merged_dora_rows_have_the_trained_lengths",
        "test_lora.py::test_every_variant_merges_saves_and_opens_with_plain_peft_on_the_untouched_base",
    ),
    39: bug(
        "Products on a base of four bits are computed in whatever format comes first",
        "the format is set when the base is loaded",
        "test_quantize.py::test_c39_products_of_four_bits_are_computed_in_a_format_that_was_chosen",
    ),
    40: bug(
        "Virtual tokens shift labels or positions",
        "the wrapper answers for the text alone; held against the same words written out",
        "test_prompt.py::test_c40_rows_of_the_vocabulary_are_the_hard_prompt_of_a_language_model",
        "test_prompt.py::test_logits_are_those_of_the_text_whatever_is_padded",
    ),
    41: bug(
        "Virtual tokens are counted as items of the loss, or forgotten when steps are cut up",
        "items are counted on the batch, before the model sees it",
        f"{TRAINING}::test_c41_what_a_method_puts_before_a_text_counts_as_no_item_of_the_loss",
        f"{TRAINING}::test_c01_accumulation_changes_neither_the_update_nor_the_logged_loss",
    ),
    42: bug(
        "An adapter is put on another base of the same shape",
        "the base's SHA-256 travels with it, and another one is refused",
        "test_run.py::test_c42_another_base_of_the_same_shape_is_refused_by_its_sha_256",
    ),
    43: bug(
        "The names of the labels are lost: LABEL_0 is served",
        "names stand in config.json; the saved folder alone must give the same labels",
        "test_run.py::test_c43_the_lines_of_usage_json_give_the_same_predictions_without_us",
        "test_run.py::test_pipeline_opens_a_run_that_stands_alone",
    ),
    # ------------------------------------------------- optimiser, precision, schedule, resume
    44: bug(
        "The schedule advances with every micro-batch",
        "the rate is a function of the optimiser's step",
        "test_engine.py::test_c44_the_rate_follows_optimiser_steps_not_micro_batches",
        f"{TRAINING}::test_c44_the_rate_follows_the_formula_however_the_step_is_cut",
    ),
    45: bug(
        "Weights kept in bf16 round small steps away and stand still",
        "what trains is float32, its moments too, whatever the base is stored in",
        f"{TRAINING}::test_c45_a_small_step_moves_every_weight_of_a_base_in_half_precision",
        "test_contracts.py::test_what_trains_is_float32_includes_what_is_fresh_and_stands_in_one_group",
    ),
    46: bug(
        "Adam's epsilon is zero in float16",
        "no state is kept in float16, and the recipe has no such precision",
        f"{TRAINING}::test_c46_nothing_is_kept_in_float16_where_a_small_epsilon_would_be_zero",
    ),
    47: bug(
        "Adam without bias correction takes wrong first steps",
        "torch's AdamW, its first steps held against the paper's formula",
        f"{TRAINING}::test_c47_adam_corrects_the_bias_of_its_means",
    ),
    48: bug(
        "A NaN passes as success: logged as 0, or written over the last good checkpoint",
        "the step is not taken, rows and module are named, weights that are not finite are never written",
        "test_engine.py::test_c48_a_loss_that_is_not_finite_stops_before_the_step_and_names_rows",
        f"{TRAINING}::test_c48_a_nan_is_named_with_its_place_whatever_the_base_is_stored_in",
        "test_faults.py::test_nan_stops_before_the_step_and_names_step_rows_and_module",
        "test_faults.py::test_weights_that_are_not_finite_are_never_written_nor_the_best",
    ),
    49: bug(
        "The loss scaler of float16 is forgotten on resume",
        "does not concern us: there is no float16 and no scaler, only float32 and bf16",
    ),
    50: bug(
        "A resumed run lacks random state, sampler or moments, and goes on differently",
        "batches and noise are functions of the step; a checkpoint is whole by its manifest or is not taken",
        "test_matrix.py::test_c50_stopped_in_the_middle_and_started_again_ends_with_the_same_bytes",
        "test_engine.py::test_a_damaged_checkpoint_is_found_named_and_skipped",
        "test_kills.py::test_every_killed_run_continues_by_itself_and_ends_with_the_same_bytes",
    ),
    51: bug(
        "Settings or rows changed since are ignored on resume, or mixed in",
        "recipe and data are compared by digest; what differs is named, and goes on only with leave",
        "test_run.py::test_c51_another_recipe_in_the_same_folder_is_refused_with_the_keys_that_differ",
        "test_faults.py::test_a_changed_learning_rate_needs_leave_and_is_then_used",
        "test_faults.py::test_changed_rows_need_leave",
        "test_faults.py::test_another_model_task_method_or_seed_is_another_run",
        "test_recipe.py::test_the_digest_changes_when_a_value_changes",
    ),
    52: bug(
        "Early stopping keeps the last weights and not the best",
        "the best are put back before anything is saved",
        "test_engine.py::test_c52_early_stopping_restores_the_best_weights",
        f"{TRAINING}::test_c52_what_is_saved_is_the_best_and_not_the_last",
        "test_layers.py::test_the_best_of_an_early_stage_puts_later_layers_back_to_the_base",
    ),
    53: bug(
        "The best is chosen on test rows, or is a NaN",
        "only validation rows are judged by; the test rows are opened once, at the end",
        f"{TRAINING}::test_c53_the_best_is_chosen_on_validation_rows_and_is_never_a_nan",
    ),
    54: bug(
        "Ranks see rows twice, or an uneven last batch is filled up",
        "ranks share the micro-batches of one process; a rank may have none",
        "test_ranks.py::test_c54_the_shares_of_a_step_are_its_micro_batches_each_once",
        "test_ranks.py::test_every_held_out_row_is_answered_once_and_as_by_one_process",
    ),
    55: bug(
        "Fewer rows than a batch give no step at all",
        "nothing is dropped: a step may be small",
        "test_engine.py::test_c55_few_rows_still_make_a_step",
        f"{TRAINING}::test_c55_fewer_rows_than_a_batch_still_train",
    ),
    56: bug(
        "Loader processes share a seed, and draw the same augmentation",
        "there are none; chance is keyed by seed, epoch and row, whoever draws it",
        f"{TRAINING}::test_c56_chance_depends_on_the_row_and_not_on_who_draws_it",
        "test_contracts.py::test_augment_depends_on_its_generator_alone",
    ),
    57: bug(
        "Nothing trains, and that comes out late or never",
        "a selection that matches nothing is refused with the names there are",
        "test_layers.py::test_c57_a_selection_that_finds_nothing_is_refused_with_what_there_is",
        "test_methods.py::test_targets_that_match_nothing_are_named_with_what_there_is",
    ),
    # ----------------------------------------- preferences, speech, detection: not there yet
    58: bug("Policy and reference differ before the first step, by dropout", NOT_BUILT + "preference tasks"),
    59: bug("Log-probabilities of an answer count its padding or its question", NOT_BUILT + "preference tasks"),
    60: bug("Pairs whose answers are equal or empty are learnt from", NOT_BUILT + "preference tasks"),
    61: bug("The reference moves with the policy", NOT_BUILT + "preference tasks"),
    62: bug("Small choices of PPO differ (signs, whitening, value head)", NOT_BUILT + "learning from rewards"),
    63: bug("Normalising by length or spread favours long answers", NOT_BUILT + "learning from rewards"),
    64: bug("Groups whose rewards are all equal, missing or NaN teach nothing", NOT_BUILT + "learning from rewards"),
    65: bug("A speech decoder's start token stands twice, or its padding is learnt", NOT_BUILT + "speech"),
    66: bug("Language and task tokens differ between training and transcribing", NOT_BUILT + "speech"),
    67: bug("Boxes are read in another format than they were drawn in", NOT_BUILT + "detection"),
    68: bug("A class of a mask is the number that means ignore", NOT_BUILT + "segmentation"),
    # --------------------------------------------------------------------- evaluation, data
    69: bug(
        "A loss is averaged over batches, so that it depends on their size",
        "scores are made row by row and pooled over rows or tokens",
        "test_matrix.py::test_c69_evaluation_is_the_same_for_every_batch_size",
        "test_causal_lm.py::test_perplexity_pools_tokens_and_not_rows",
    ),
    70: bug(
        "Copies stand on both sides of a split, test rows add classes, augmentation reaches the evaluation",
        "rows are split by content; labels come from training rows; nothing is drawn when answers are measured",
        f"{TRAINING}::test_c70_copies_stand_on_one_side_and_an_evaluation_can_be_repeated",
        "test_data.py::test_copies_and_groups_never_stand_on_both_sides",
        "test_data.py::test_equal_images_never_stand_on_both_sides",
        "test_run.py::test_no_content_stands_on_both_sides",
        "test_bad_input.py::test_row_37_a_class_never_comes_from_the_test_set",
        "test_bad_input.py::test_row_36_class_folders_stand_in_natural_order",
    ),
}


def table() -> str:
    """The rows of docs/silent-bugs.md."""
    lines = ["| | the bug | how it is stopped here | tests |", "|---|---|---|---|"]
    for number, entry in sorted(CATALOGUE.items()):
        tests = "<br>".join(f"`{name.replace('::', ' ')}`" for name in entry.tests) or "-"
        lines.append(f"| C{number} | {entry.bug} | {entry.stopped} | {tests} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
