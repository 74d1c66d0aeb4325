"""Success, measured: fixed seeds, intervals, paired comparison, reports."""
