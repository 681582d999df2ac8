"""What eval.py is made of: questions, answers, numbers, and the page that tells them."""
