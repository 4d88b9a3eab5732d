"""What a network computes and skips: plans, times, multiply-adds."""
