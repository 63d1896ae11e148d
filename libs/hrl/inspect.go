package hrl

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// Format is an output format of Inspect.
type Format string

// The formats of Inspect.
const (
	FormatTable Format = "table"
	FormatJSON  Format = "json"
)

// The JSON form of a log. The keys are the specification's field names in snake case; position, file_position and
// sha256 are ours.
type (
	headerJSON struct {
		Cookie                string  `json:"cookie"`
		LogFormatVersion      uint32  `json:"log_format_version"`
		TimeStamp             uint32  `json:"time_stamp"`
		CreatorApplication    string  `json:"creator_application"`
		CreatorVersion        uint32  `json:"creator_version"`
		OriginalSize          uint64  `json:"original_size"`
		CurrentSize           uint64  `json:"current_size"`
		Checksum              uint32  `json:"checksum"`
		EOLLocation           uint64  `json:"eol_location"`
		ErrorCode             int32   `json:"error_code"`
		MetadataSize          uint32  `json:"metadata_size"`
		UniqueID              string  `json:"unique_id"`
		PreviousUniqueID      string  `json:"previous_unique_id"`
		LastModifiedTimeStamp uint32  `json:"last_modified_time_stamp"`
		TotalMetadataEntries  uint64  `json:"total_metadata_entries"`
		FileType              uint32  `json:"file_type"`
		Flags                 [2]byte `json:"flags"`
		Vhd2DataWriteGUID     string  `json:"vhd2_data_write_guid"`
	}
	blockJSON struct {
		Position                 int64  `json:"position"`
		PreviousMetadataLocation uint64 `json:"previous_metadata_location"`
		ValidMetadataEntries     uint32 `json:"valid_metadata_entries"`
		Checksum                 uint32 `json:"checksum"`
	}
	entryJSON struct {
		ByteOffset    uint64 `json:"byte_offset"`
		Checksum      uint32 `json:"checksum"`
		DataLength    uint32 `json:"data_length"`
		TimeStamp     uint32 `json:"time_stamp"`
		MetaOperation uint8  `json:"meta_operation"`
		DataChecksum  uint32 `json:"data_checksum"`
		Location      uint8  `json:"location"`
		FilePosition  int64  `json:"file_position"`
		SHA256        string `json:"sha256"`
	}
	tailJSON struct {
		Position int64  `json:"position"`
		Unproven int64  `json:"unproven_bytes"`
		Reason   string `json:"reason"`
	}
	errorJSON struct {
		Part     Part   `json:"part,omitempty"`
		Position *int64 `json:"position,omitempty"`
		Block    *int   `json:"block,omitempty"`
		Entry    *int   `json:"entry,omitempty"`
		Message  string `json:"message"`
	}
)

// InspectFile is Inspect for the file at path.
func InspectFile(ctx context.Context, path string, w io.Writer, format Format) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("inspect log: %w", err)
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("inspect log: %w", err)
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("inspect log: %s is not a regular file", path)
	}
	return Inspect(ctx, f, st.Size(), w, format)
}

// Inspect prints the log of size bytes in r to w: header, blocks, and entries in the order written, each with the
// position and SHA-256 of its data. It streams, and also checks data against DataChecksum. What is wrong with the
// log is part of the output, which in JSON stays well-formed with a last key "error", and is returned as well.
func Inspect(ctx context.Context, r io.ReaderAt, size int64, w io.Writer, format Format) error {
	out := bufio.NewWriterSize(w, 64<<10)
	var p printer
	switch format {
	case FormatTable:
		p = &tablePrinter{w: out}
	case FormatJSON:
		p = &jsonPrinter{w: out}
	default:
		return fmt.Errorf("inspect log: unknown format %q", format)
	}
	err := inspect(ctx, r, size, p)
	p.end(err)
	if flushErr := out.Flush(); flushErr != nil {
		return fmt.Errorf("inspect log: write output: %w", flushErr)
	}
	return err
}

// printer receives the parts of a log in order. Write errors stay in its bufio.Writer until the flush.
type printer interface {
	header(closed bool, h Header)
	block(b *Block)
	entry(e Entry, sum string)
	endBlock()
	tail(t Tail)
	end(err error)
}

func inspect(ctx context.Context, r io.ReaderAt, size int64, p printer) error {
	rd, err := Open(r, size)
	if err != nil {
		return err
	}
	p.header(rd.Closed(), rd.Header())
	buf := make([]byte, windowSize)
	for b, err := range rd.Blocks(ctx) {
		if err != nil {
			return err
		}
		p.block(b)
		for i, e := range b.Entries {
			sum, err := hashData(ctx, r, e, buf)
			if err != nil {
				var c *CorruptError
				if errors.As(err, &c) {
					c.Block, c.Entry = b.Index, i
				}
				p.endBlock()
				return err
			}
			p.entry(e, sum)
		}
		p.endBlock()
	}
	if !rd.Closed() {
		p.tail(rd.Tail())
	}
	return nil
}

// hashData returns the SHA-256 of an entry's data in hex, and checks its DataChecksum if it has one.
func hashData(ctx context.Context, r io.ReaderAt, e Entry, buf []byte) (string, error) {
	h := sha256.New()
	var sum uint32
	for done := int64(0); done < int64(e.DataLength); {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		p := buf[:min(int64(len(buf)), int64(e.DataLength)-done)]
		if err := readFull(r, p, e.FilePosition+done); err != nil {
			return "", fmt.Errorf("read log data at %d: %w", e.FilePosition+done, err)
		}
		h.Write(p)
		sum += byteSum(p)
		done += int64(len(p))
	}
	if e.DataChecksum != 0 && ^sum != e.DataChecksum {
		return "", dataError(-1, -1, e, ^sum)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

type jsonPrinter struct {
	w               *bufio.Writer
	opened          bool // the header was printed, "blocks" is open
	blocks, entries int
}

func (p *jsonPrinter) put(v any) {
	b, err := json.Marshal(v)
	if err != nil { // our own plain structs: cannot happen
		panic(err)
	}
	_, _ = p.w.Write(b)
}

func (p *jsonPrinter) header(closed bool, h Header) {
	p.opened = true
	_, _ = fmt.Fprintf(p.w, "{\n  \"closed\": %t,\n  \"header\": ", closed)
	p.put(headerJSON{
		Cookie: strings.TrimRight(string(cookie[:]), "\x00"), LogFormatVersion: h.LogFormatVersion,
		TimeStamp: h.TimeStamp, CreatorApplication: text(h.CreatorApplication[:]), CreatorVersion: h.CreatorVersion,
		OriginalSize: h.OriginalSize, CurrentSize: h.CurrentSize, Checksum: h.Checksum, EOLLocation: h.EOLLocation,
		ErrorCode: h.ErrorCode, MetadataSize: h.MetadataSize, UniqueID: h.UniqueID.String(),
		PreviousUniqueID: h.PreviousUniqueID.String(), LastModifiedTimeStamp: h.LastModifiedTimeStamp,
		TotalMetadataEntries: h.TotalMetadataEntries, FileType: h.FileType, Flags: h.Flags,
		Vhd2DataWriteGUID: h.Vhd2DataWriteGUID.String(),
	})
	_, _ = p.w.WriteString(",\n  \"blocks\": [")
}

func (p *jsonPrinter) block(b *Block) {
	p.separate(&p.blocks, "\n    ")
	head, err := json.Marshal(blockJSON{b.Position, b.PreviousMetadataLocation, b.ValidMetadataEntries, b.Checksum})
	if err != nil {
		panic(err)
	}
	_, _ = p.w.Write(head[:len(head)-1]) // leave the object open
	_, _ = p.w.WriteString(`,"entries":[`)
	p.entries = 0
}

func (p *jsonPrinter) entry(e Entry, sum string) {
	p.separate(&p.entries, "\n      ")
	p.put(entryJSON{e.ByteOffset, e.Checksum, e.DataLength, e.TimeStamp, e.MetaOperation, e.DataChecksum, e.Location,
		e.FilePosition, sum})
}

func (p *jsonPrinter) endBlock() {
	if p.entries > 0 {
		_, _ = p.w.WriteString("\n    ")
	}
	_, _ = p.w.WriteString("]}")
}

func (p *jsonPrinter) tail(t Tail) {
	p.closeBlocks()
	_, _ = p.w.WriteString(",\n  \"tail\": ")
	p.put(tailJSON(t))
}

func (p *jsonPrinter) end(err error) {
	if !p.opened {
		_, _ = p.w.WriteString("{")
	}
	p.closeBlocks()
	if err != nil {
		if p.opened {
			_ = p.w.WriteByte(',')
		}
		_, _ = p.w.WriteString("\n  \"error\": ")
		p.put(describe(err))
	}
	_, _ = p.w.WriteString("\n}\n")
}

// closeBlocks ends the list of blocks once.
func (p *jsonPrinter) closeBlocks() {
	if !p.opened || p.blocks < 0 {
		return
	}
	if p.blocks > 0 {
		_, _ = p.w.WriteString("\n  ")
	}
	_ = p.w.WriteByte(']')
	p.blocks = -1
}

func (p *jsonPrinter) separate(n *int, indent string) {
	if *n > 0 {
		_ = p.w.WriteByte(',')
	}
	*n++
	_, _ = p.w.WriteString(indent)
}

func describe(err error) errorJSON {
	out := errorJSON{Message: err.Error()}
	var c *CorruptError
	if errors.As(err, &c) {
		out.Part, out.Position = c.Part, &c.Position
		if c.Block >= 0 {
			out.Block = &c.Block
		}
		if c.Entry >= 0 {
			out.Entry = &c.Entry
		}
	}
	return out
}

type tablePrinter struct {
	w     *bufio.Writer
	index int
}

func (p *tablePrinter) line(format string, args ...any) {
	_, _ = fmt.Fprintf(p.w, format+"\n", args...)
}

func (p *tablePrinter) header(closed bool, h Header) {
	state := "yes"
	if !closed {
		state = "NO: only what is provably whole is listed"
	}
	p.line("Closed                 %s", state)
	p.line("LogFormatVersion       %d.%d", h.LogFormatVersion>>16, h.LogFormatVersion&0xffff)
	p.line("UniqueId               %s", h.UniqueID)
	p.line("PreviousUniqueId       %s", h.PreviousUniqueID)
	p.line("Vhd2DataWriteGuid      %s", h.Vhd2DataWriteGUID)
	p.line("TimeStamp              %s", stampText(h.TimeStamp))
	p.line("LastModifiedTimeStamp  %s", stampText(h.LastModifiedTimeStamp))
	p.line("CreatorApplication     %q", text(h.CreatorApplication[:]))
	p.line("CreatorVersion         %#08x", h.CreatorVersion)
	p.line("OriginalSize           %d", h.OriginalSize)
	p.line("CurrentSize            %d", h.CurrentSize)
	p.line("EOLLocation            %d", h.EOLLocation)
	p.line("MetadataSize           %d", h.MetadataSize)
	p.line("TotalMetadataEntries   %d", h.TotalMetadataEntries)
	p.line("ErrorCode              %d", h.ErrorCode)
	p.line("Checksum               %d", h.Checksum)
}

func (p *tablePrinter) block(b *Block) {
	p.index = 0
	p.line("")
	p.line("Block %d at %d: ValidMetadataEntries %d, PreviousMetadataLocation %d, Checksum %d",
		b.Index, b.Position, b.ValidMetadataEntries, b.PreviousMetadataLocation, b.Checksum)
	if len(b.Entries) > 0 {
		p.line("%5s %15s %10s %14s %20s %11s %13s  %s", "ENTRY", "BYTE OFFSET", "LENGTH", "FILE POSITION",
			"TIME", "CHECKSUM", "DATA CHECKSUM", "SHA256")
	}
}

func (p *tablePrinter) entry(e Entry, sum string) {
	p.index++
	p.line("%5d %15d %10d %14d %20s %11d %13d  %s", p.index, e.ByteOffset, e.DataLength, e.FilePosition,
		stampText(e.TimeStamp), e.Checksum, e.DataChecksum, sum)
}

func (p *tablePrinter) endBlock() {}

func (p *tablePrinter) tail(t Tail) {
	p.line("")
	p.line("Not closed: whole up to %d, %d bytes after it are not proved (%s)", t.Position, t.Unproven, t.Reason)
}

func (p *tablePrinter) end(err error) {
	if err != nil {
		p.line("")
		p.line("Error: %v", err)
	}
}

func stampText(s uint32) string { return StampTime(s).Format(time.RFC3339) }

// text is a fixed field without its padding.
func text(p []byte) string { return strings.TrimRight(string(p), "\x00 ") }
