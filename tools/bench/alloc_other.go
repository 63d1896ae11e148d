//go:build !unix

package bench

import "os"

// allocated is the length of a file: the space that it takes is not asked for here.
func allocated(info os.FileInfo) int64 { return info.Size() }
