//go:build !linux && !windows

package dir

import (
	"errors"
	"os"
)

// This file lets the package compile elsewhere; Open fails, because no lock that belongs to a file
// description is at hand.

const sharedCounters = false

var errPlatform = errors.New("the dir store runs on Linux and Windows only")

func tryLock(*os.File, int64, int64, bool) (bool, error) { return false, errPlatform }
func unlock(*os.File, int64, int64) error                { return errPlatform }
func unlockHeld(*os.File, int64, *[lockBytes]bool) error { return errPlatform }
func isFull(error) bool                                  { return false }
func fdatasync(f *os.File) error                         { return f.Sync() }
func syncDir(string) error                               { return nil }
func bootID() [16]byte                                   { return randomBoot() }
func cloneFile(_, _ *os.File) bool                       { return false }
func makeSparse(*os.File) error                          { return nil }
func gone(*os.File) bool                                 { return false }

func nextData(_ *os.File, offset, end int64) (from, to int64, ok bool, err error) {
	return offset, end, offset < end, nil
}

func punchHole(*os.File, int64, int64) (bool, error)    { return false, nil }
func copyRange(_, _ *os.File, _, _ int64) (bool, error) { return false, nil }
