package qemutarget

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	// tailBytes bounds the console text in evidence.
	tailBytes = 4 << 10
	// rawTail is how much of the file is looked at for it: escape sequences take most of what firmware writes.
	rawTail = 32 << 10
	// window is how much is read at once, and overlap how much of what was seen is looked at again with it, so that a match
	// is found across the border.
	window  = 256 << 10
	overlap = 4 << 10
)

// escapes are the sequences by which a terminal is driven: CSI, OSC, charset choices and single ones.
var escapes = regexp.MustCompile(`\x1b(\[[0-9;?<=>!]*[ -/]*[@-~]?|\][^\x07\x1b]*(\x07|\x1b\\)?|[ -/]+[0-~]?|[0-Z\\-~])?`)

// plain makes terminal output readable: what places the cursor becomes a line end, everything else that is not text goes.
func plain(raw []byte) string {
	text := escapes.ReplaceAllFunc(raw, func(e []byte) []byte {
		if bytes.HasPrefix(e, []byte("\x1b[")) && (bytes.HasSuffix(e, []byte("H")) || bytes.HasSuffix(e, []byte("J"))) {
			return []byte{'\n'}
		}
		return nil
	})
	var b strings.Builder
	last := '\n'
	for len(text) > 0 {
		r, n := utf8.DecodeRune(text)
		text = text[n:]
		if r == '\r' {
			r = '\n'
		}
		if r == utf8.RuneError && n == 1 {
			r = '?'
		}
		if r == '\n' && last == '\n' || r != '\n' && r != '\t' && !unicode.IsPrint(r) {
			continue
		}
		b.WriteRune(r)
		last = r
	}
	return b.String()
}

// console reads the console file as it grows.
type console struct {
	path  string
	off   int64
	carry []byte
}

// find reports whether the pattern is in what was written since the last call, or across its beginning.
func (c *console) find(pattern *regexp.Regexp) (bool, error) {
	f, err := os.Open(c.path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	buf := make([]byte, window)
	for {
		n, err := f.ReadAt(buf, c.off)
		if err != nil && !errors.Is(err, io.EOF) {
			return false, err
		}
		if n == 0 {
			return false, nil
		}
		c.off += int64(n)
		seen := append(c.carry, buf[:n]...)
		if pattern.MatchString(plain(seen)) {
			return true, nil
		}
		c.carry = bytes.Clone(seen[max(0, len(seen)-overlap):])
	}
}

// consoleTail is the end of the console's text, at most tailBytes of it; "" when there is none.
func consoleTail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return ""
	}
	raw := make([]byte, min(size, rawTail))
	n, _ := f.ReadAt(raw, size-int64(len(raw)))
	return tail(plain(raw[:n]), tailBytes)
}

// tail is the end of a text, of whole lines where there are some, of whole runes always.
func tail(text string, limit int) string {
	text = strings.TrimRight(text, "\n\t ")
	if len(text) <= limit {
		return text
	}
	text = text[len(text)-limit:]
	if i := strings.IndexByte(text, '\n'); i >= 0 && i < len(text)/2 {
		return text[i+1:]
	}
	for len(text) > 0 && !utf8.RuneStart(text[0]) {
		text = text[1:]
	}
	return text
}

// lastLine is the last line of a text.
func lastLine(text string) string { return text[strings.LastIndexByte(text, '\n')+1:] }

// complaint is what QEMU last wrote to its log, without warnings, as a clause of an error.
func complaint(path string) string {
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Sprintf("its log cannot be read: %v", err)
	}
	var lines []string
	for line := range strings.SplitSeq(tail(plain(raw), 1000), "\n") {
		if line != "" && !strings.Contains(line, ": warning: ") {
			lines = append(lines, line)
		}
	}
	if len(lines) == 0 {
		return "it said nothing"
	}
	return strings.Join(lines, "; ")
}
