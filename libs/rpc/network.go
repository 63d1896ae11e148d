package rpc

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
)

// memPrefix marks addresses of in-memory listeners.
const memPrefix = "mem:"

// IsMemory reports whether an address is of the form "mem:<name>".
func IsMemory(address string) bool { return strings.HasPrefix(address, memPrefix) }

// Errors of in-memory addresses.
var (
	// ErrAddressInUse is returned by Listen for an in-memory name that has a listener.
	ErrAddressInUse = errors.New("address already in use")
	// ErrConnectionRefused is returned by Dial for an in-memory name without a listener.
	ErrConnectionRefused = errors.New("connection refused")
)

// Network makes listeners and connections from addresses: "host:port" is TCP, on which servers and
// clients of this package insist on mutual TLS; "mem:<name>" is a buffered connection inside the
// process, which needs no TLS because it carries the dialer's identity. In-memory names are known only
// within one Network, so tests do not meet. The zero value is ready. Safe for concurrent use.
type Network struct {
	mu        sync.Mutex
	listeners map[string]*memListener
}

// Listen opens a listener. The address of a TCP listener on port 0 is known from its Addr.
func (n *Network) Listen(ctx context.Context, address string) (net.Listener, error) {
	if !IsMemory(address) {
		lis, err := new(net.ListenConfig).Listen(ctx, "tcp", address)
		if err != nil {
			return nil, fmt.Errorf("listen on %s: %w", address, err)
		}
		return lis, nil
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if _, taken := n.listeners[address]; taken {
		return nil, fmt.Errorf("listen on %s: %w", address, ErrAddressInUse)
	}
	if n.listeners == nil {
		n.listeners = make(map[string]*memListener)
	}
	l := &memListener{network: n, addr: memAddr(address), conns: make(chan net.Conn), done: make(chan struct{})}
	n.listeners[address] = l
	return l, nil
}

// Dial opens a connection; an in-memory one speaks for the given identity, a TCP one is plain and
// still needs its TLS handshake.
func (n *Network) Dial(ctx context.Context, address string, as Peer) (net.Conn, error) {
	if !IsMemory(address) {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if err != nil {
			return nil, fmt.Errorf("dial %s: %w", address, err)
		}
		return conn, nil
	}
	n.mu.Lock()
	l := n.listeners[address]
	n.mu.Unlock()
	if l == nil {
		return nil, fmt.Errorf("dial %s: %w", address, ErrConnectionRefused)
	}
	client, server := memPipe(l.addr, as)
	select {
	case l.conns <- server:
		return client, nil
	case <-l.done:
		return nil, fmt.Errorf("dial %s: %w", address, ErrConnectionRefused)
	case <-ctx.Done():
		return nil, fmt.Errorf("dial %s: %w", address, ctx.Err())
	}
}

type memListener struct {
	network *Network
	addr    memAddr
	conns   chan net.Conn
	once    sync.Once
	done    chan struct{}
}

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, fmt.Errorf("accept on %s: %w", l.addr, net.ErrClosed)
	}
}

func (l *memListener) Close() error {
	l.once.Do(func() {
		l.network.mu.Lock()
		delete(l.network.listeners, string(l.addr))
		l.network.mu.Unlock()
		close(l.done)
	})
	return nil
}

func (l *memListener) Addr() net.Addr { return l.addr }

// memAddr is an in-memory address, with its prefix.
type memAddr string

func (memAddr) Network() string  { return "mem" }
func (a memAddr) String() string { return string(a) }
