package server

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/landfall-dr/landfall/libs/nbd/internal/wire"
)

// conn is one client.
type conn struct {
	server *Server
	nc     net.Conn
	in     *bufio.Reader
	done   chan struct{}

	disk       Disk
	writer     Writer // nil: read-only
	structured bool
	meta       string // export that base:allocation was asked for; empty for none

	mu       sync.Mutex // guards name and stopping
	name     string
	stopping bool

	out sync.Mutex // one reply at a time
}

func (c *conn) export() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.name
}

func (c *conn) stopped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopping
}

// stop makes the reading end. Requests in flight are answered still, however long the disk takes: only a client that
// does not take a reply is cut off.
func (c *conn) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopping = true
	_ = c.nc.SetReadDeadline(time.Unix(1, 0)) // an error means that it is closed already
	_ = c.nc.SetWriteDeadline(time.Now().Add(c.server.limits.drain))
}

// armRead sets the read deadline unless the connection is to stop.
func (c *conn) armRead(deadline time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.stopping {
		_ = c.nc.SetReadDeadline(deadline)
	}
}

// armWrite gives the client so long to take what is written next, or less if the connection is to stop.
func (c *conn) armWrite(patience time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stopping {
		patience = min(patience, c.server.limits.drain)
	}
	_ = c.nc.SetWriteDeadline(time.Now().Add(patience))
}

var errAbort = errors.New("nbd: client ended the negotiation")

func (c *conn) run() error {
	defer func() { _ = c.nc.Close() }()
	if tcp, ok := c.nc.(*net.TCPConn); ok {
		_ = tcp.SetNoDelay(true) // the default; a failure costs latency only
	}
	c.in = bufio.NewReaderSize(c.nc, 256<<10)
	c.armRead(time.Now().Add(c.server.limits.handshake))
	c.armWrite(c.server.limits.handshake)
	err := c.negotiate()
	if errors.Is(err, errAbort) {
		return nil
	}
	if err != nil {
		return err
	}
	c.armRead(time.Time{})
	return c.transmit()
}

func (c *conn) negotiate() error {
	hello := binary.BigEndian.AppendUint64(nil, wire.MagicServer)
	hello = binary.BigEndian.AppendUint64(hello, wire.MagicOption)
	hello = binary.BigEndian.AppendUint16(hello, wire.FlagFixedNewstyle|wire.FlagNoZeroes)
	if _, err := c.nc.Write(hello); err != nil {
		return err
	}
	var flags [4]byte
	if _, err := io.ReadFull(c.in, flags[:]); err != nil {
		return err
	}
	client := binary.BigEndian.Uint32(flags[:])
	if client&^(wire.FlagFixedNewstyle|wire.FlagNoZeroes) != 0 {
		return fmt.Errorf("%w: client flags %#x", errProtocol, client)
	}
	for range maxOptions {
		var head [16]byte
		if _, err := io.ReadFull(c.in, head[:]); err != nil {
			return err
		}
		if m := binary.BigEndian.Uint64(head[:]); m != wire.MagicOption {
			return fmt.Errorf("%w: option magic %#x", errProtocol, m)
		}
		opt, n := binary.BigEndian.Uint32(head[8:]), binary.BigEndian.Uint32(head[12:])
		if n > maxOption {
			if n > MaxRequest || opt == wire.OptExportName {
				return fmt.Errorf("%w: option of %d bytes", errProtocol, n)
			}
			if _, err := io.CopyN(io.Discard, c.in, int64(n)); err != nil {
				return err
			}
			if err := c.reply(opt, wire.RepErrTooBig, nil); err != nil {
				return err
			}
			continue
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(c.in, data); err != nil {
			return err
		}
		done, err := c.option(opt, data, client&wire.FlagNoZeroes != 0)
		if done || err != nil {
			return err
		}
	}
	return fmt.Errorf("%w: more than %d options", errProtocol, maxOptions)
}

// option answers one option; true ends the negotiation.
func (c *conn) option(opt uint32, data []byte, noZeroes bool) (bool, error) {
	switch opt {
	case wire.OptExportName:
		d, err := c.open(string(data))
		if err != nil {
			return false, err // the protocol has no way to refuse but to hang up
		}
		b := binary.BigEndian.AppendUint64(nil, uint64(d.Size()))
		b = binary.BigEndian.AppendUint16(b, c.flags(d))
		if !noZeroes {
			b = append(b, make([]byte, 124)...)
		}
		_, err = c.nc.Write(b)
		return true, err
	case wire.OptAbort:
		return false, errors.Join(c.reply(opt, wire.RepAck, nil), errAbort)
	case wire.OptList:
		if len(data) != 0 {
			return false, c.reply(opt, wire.RepErrInvalid, nil)
		}
		for _, name := range c.server.exports.Exports() {
			b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
			if err := c.reply(opt, wire.RepServer, append(b, name...)); err != nil {
				return false, err
			}
		}
		return false, c.reply(opt, wire.RepAck, nil)
	case wire.OptInfo, wire.OptGo:
		return c.info(opt, data)
	case wire.OptStructuredReply:
		if len(data) != 0 {
			return false, c.reply(opt, wire.RepErrInvalid, nil)
		}
		c.structured = true
		return false, c.reply(opt, wire.RepAck, nil)
	case wire.OptListMeta, wire.OptSetMeta:
		return false, c.metaContext(opt, data)
	default:
		return false, c.reply(opt, wire.RepErrUnsup, nil)
	}
}

func (c *conn) info(opt uint32, data []byte) (bool, error) {
	name, err := parseInfo(data)
	if err != nil {
		return false, c.reply(opt, wire.RepErrInvalid, []byte(err.Error()))
	}
	var d Disk
	if opt == wire.OptGo {
		d, err = c.open(name)
	} else {
		d, err = c.look(name)
	}
	if err != nil {
		return false, c.refuse(opt, err)
	}
	b := binary.BigEndian.AppendUint16(nil, wire.InfoExport)
	b = binary.BigEndian.AppendUint64(b, uint64(d.Size()))
	b = binary.BigEndian.AppendUint16(b, c.flags(d))
	if err := c.reply(opt, wire.RepInfo, b); err != nil {
		return false, err
	}
	b = binary.BigEndian.AppendUint16(nil, wire.InfoBlockSize)
	b = binary.BigEndian.AppendUint32(b, SectorSize)
	b = binary.BigEndian.AppendUint32(b, 4096)
	b = binary.BigEndian.AppendUint32(b, MaxRequest)
	if err := c.reply(opt, wire.RepInfo, b); err != nil {
		return false, err
	}
	return opt == wire.OptGo, c.reply(opt, wire.RepAck, nil)
}

func (c *conn) metaContext(opt uint32, data []byte) error {
	q, err := parseMeta(data)
	if err != nil || !c.structured {
		return c.reply(opt, wire.RepErrInvalid, nil)
	}
	name, err := c.resolve(q.export)
	var d Disk
	if err == nil {
		d, err = c.server.exports.Open(name)
	}
	if err != nil {
		return c.refuse(opt, err)
	}
	_, maps := d.(Allocator)
	if opt == wire.OptSetMeta {
		c.meta = ""
	}
	found := opt == wire.OptListMeta && len(q.queries) == 0
	for _, query := range q.queries {
		found = found || query == wire.ContextAllocation || opt == wire.OptListMeta && query == "base:"
	}
	if found && maps {
		id := uint32(0)
		if opt == wire.OptSetMeta {
			c.meta, id = name, contextID
		}
		b := binary.BigEndian.AppendUint32(nil, id)
		if err := c.reply(opt, wire.RepMeta, append(b, wire.ContextAllocation...)); err != nil {
			return err
		}
	}
	return c.reply(opt, wire.RepAck, nil)
}

// resolve returns the export that name means: itself, or the only one there is for the empty name.
func (c *conn) resolve(name string) (string, error) {
	if len(name) > wire.MaxName {
		return "", fmt.Errorf("export name of %d bytes, the longest is %d", len(name), wire.MaxName)
	}
	if name != "" {
		return name, nil
	}
	names := c.server.exports.Exports()
	switch len(names) {
	case 0:
		return "", errors.New("no disk is exported")
	case 1:
		return names[0], nil
	}
	more := ""
	if len(names) > maxNamed {
		more = fmt.Sprintf(" and %d more", len(names)-maxNamed)
		names = names[:maxNamed]
	}
	return "", fmt.Errorf("several disks are exported: name one of %s%s", strings.Join(names, ", "), more)
}

// look returns the disk of an export without taking it.
func (c *conn) look(name string) (Disk, error) {
	name, err := c.resolve(name)
	if err != nil {
		return nil, err
	}
	return c.server.exports.Open(name)
}

// flags are the transmission flags of d.
func (c *conn) flags(d Disk) uint16 {
	flags := uint16(exportFlags | readOnlyFlags)
	if _, ok := d.(Writer); ok {
		flags = exportFlags | writableFlags
	}
	if c.structured {
		flags |= wire.ExportDF
	}
	if fastZero(d) {
		flags |= wire.ExportFastZero
	}
	return flags
}

func fastZero(d Disk) bool {
	f, ok := d.(FastZeroer)
	return ok && f.FastZero()
}

// refuse answers an option that names no export. The text is for people.
func (c *conn) refuse(opt uint32, err error) error {
	text := err.Error()
	code := uint32(wire.RepErrUnknown)
	if errors.Is(err, ErrForbidden) {
		code = wire.RepErrPolicy
	}
	return c.reply(opt, code, []byte(text[:min(len(text), wire.MaxName)]))
}

// open takes the export for this connection. The name is visible to CloseExports before the disk is looked up, so that
// a detach either finds the connection or makes the look-up fail.
func (c *conn) open(name string) (Disk, error) {
	name, err := c.resolve(name)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	c.name = name
	c.mu.Unlock()
	d, err := c.server.exports.Open(name)
	if err != nil {
		c.mu.Lock()
		c.name = ""
		c.mu.Unlock()
		return nil, err
	}
	if c.meta != name {
		c.meta = ""
	}
	c.disk = d
	c.writer, _ = d.(Writer)
	return d, nil
}

func (c *conn) reply(opt, kind uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, wire.MagicReply)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := c.nc.Write(append(b, data...))
	return err
}
