"""Pretraining: `trainer.train(TrainConfig(...))`, on one process or many."""
