"""Answers requests for texts: routes, the thread behind them, a page."""
