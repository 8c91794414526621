"""What a trained model attends to, of one text: read off (`reading`), held (`maps`), and shown in a terminal (`table`),
as SVG (`picture`) and as an interactive page (`page`)."""
