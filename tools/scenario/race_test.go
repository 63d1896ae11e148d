//go:build race

package scenario

// raceEnabled: the race detector's own memory is not the product's.
const raceEnabled = true
