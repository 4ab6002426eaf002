"""Claims of papers and the experiments that test them, one file each. `arena.study` says what a study is."""
