"""The knobs of a job: one group of them a file, with the rules that they are under."""
