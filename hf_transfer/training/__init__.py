"""`TransferTrainer`, which carries out a Plan."""
