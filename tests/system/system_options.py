"""Options of a training run of a fraction of a second; with dropout, so that its state matters."""

TINY = [
    *("--hidden", "12", "--layers", "2", "--heads", "2", "--dropout", "0.1"),
    *("--context", "12", "--batch-size", "4", "--steps", "12"),
    *("--eval-every", "4", "--save-every", "5", "--threads", "1", "--device", "cpu"),
    *("--quiet", "--no-plot"),
]
