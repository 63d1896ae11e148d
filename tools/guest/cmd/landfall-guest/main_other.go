//go:build !linux

// Command landfall-guest runs in the lab guest, which is a Linux machine.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Fprintln(os.Stderr, "landfall-guest runs in the lab guest, on Linux")
	os.Exit(1)
}
