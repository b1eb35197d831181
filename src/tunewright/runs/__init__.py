"""One recipe, one folder: training, evidence, report, prediction."""
