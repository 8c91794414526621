"""Training: one pure step, run over all devices, recorded in plain files, resumed bit for bit."""
