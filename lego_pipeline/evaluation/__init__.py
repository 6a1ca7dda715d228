"""What a reviewer measures with: `judge` reads a pair of frames of the embedded kitchen and says what was done."""
