package rpc

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/credentials"

	"github.com/landfall-dr/landfall/libs/rpc/pki"
)

// transport is the security of both kinds of connection: in-memory ones carry the dialer's identity,
// all others must do mutual TLS.
type transport struct {
	tls credentials.TransportCredentials // nil without a certificate
	own Peer
	// trust, for clients, remembers why the last handshake failed.
	trust *trust
}

// inProcess is a connection that cannot leave the process and knows who dialled it.
type inProcess interface{ speaksFor() Peer }

var errNoCertificate = errors.New("this program has no certificate: only in-memory connections are possible")

func serverCredentials(id Identity) credentials.TransportCredentials {
	t := &transport{own: id.Peer}
	if id.Files != nil {
		t.tls = credentials.NewTLS(id.Files.Server(nil))
	}
	return t
}

func clientCredentials(id Identity, check func(Peer) error) *transport {
	t := &transport{own: id.Peer, trust: &trust{}}
	if id.Files != nil {
		t.tls = credentials.NewTLS(id.Files.Client(check))
	}
	return t
}

// ServerHandshake implements credentials.TransportCredentials.
func (t *transport) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if m, ok := raw.(inProcess); ok {
		return raw, memInfo(m.speaksFor()), nil
	}
	if t.tls == nil {
		return nil, nil, errNoCertificate
	}
	gentle := &gentleConn{Conn: raw}
	conn, info, err := t.tls.ServerHandshake(gentle)
	if err != nil {
		return nil, nil, err
	}
	gentle.greeted.Store(true)
	auth, err := tlsInfo(info)
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	return conn, auth, nil
}

// ClientHandshake implements credentials.TransportCredentials.
func (t *transport) ClientHandshake(ctx context.Context, authority string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if _, ok := raw.(inProcess); ok {
		return raw, memInfo(Peer{}), nil
	}
	if t.tls == nil {
		return nil, nil, errNoCertificate
	}
	conn, info, err := t.tls.ClientHandshake(ctx, authority, raw)
	if err != nil {
		if errors.Is(err, pki.ErrUntrusted) || isAlert(err) {
			t.trust.set(err)
		}
		return nil, nil, err
	}
	auth, err := tlsInfo(info)
	if err != nil {
		return nil, nil, errors.Join(err, conn.Close())
	}
	// With TLS 1.3 the server's refusal of our certificate arrives with the first read.
	return &alertConn{Conn: conn, trust: t.trust}, auth, nil
}

// Info implements credentials.TransportCredentials.
func (t *transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

// Clone implements credentials.TransportCredentials.
func (t *transport) Clone() credentials.TransportCredentials {
	c := *t
	if t.tls != nil {
		c.tls = t.tls.Clone()
	}
	return &c
}

// OverrideServerName implements credentials.TransportCredentials; names are not what trust rests on.
func (t *transport) OverrideServerName(string) error { return nil }

func memInfo(p Peer) authInfo {
	return authInfo{
		CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity},
		kind:           "memory", peer: p,
	}
}

func tlsInfo(info credentials.AuthInfo) (authInfo, error) {
	state, ok := info.(credentials.TLSInfo)
	if !ok || len(state.State.PeerCertificates) == 0 {
		return authInfo{}, errors.New("the other side sent no certificate")
	}
	id, err := pki.FromCertificate(state.State.PeerCertificates[0])
	if err != nil {
		return authInfo{}, err
	}
	return authInfo{CommonAuthInfo: state.CommonAuthInfo, kind: "tls", peer: id}, nil
}

// gentleConn closes a connection whose handshake was refused so that the alert arrives: a plain close
// with unread bytes resets the connection, and the client would see only that.
type gentleConn struct {
	net.Conn
	greeted atomic.Bool
}

const (
	gentleTime  = 500 * time.Millisecond
	gentleBytes = 64 << 10
)

func (c *gentleConn) Close() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok && !c.greeted.Load() {
		if half.CloseWrite() == nil && c.SetReadDeadline(time.Now().Add(gentleTime)) == nil {
			_, _ = io.CopyN(io.Discard, c.Conn, gentleBytes)
		}
	}
	return c.Conn.Close()
}

// trust holds the newest failure of a client's handshakes that is about certificates, so that the
// error of a call can say so; gRPC itself passes on only text.
type trust struct {
	mu  sync.Mutex
	err error
}

func (t *trust) set(err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.err = err
}

func (t *trust) get() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// alertConn notes a TLS alert in place of the first bytes, and clears the note when bytes come.
type alertConn struct {
	net.Conn
	trust *trust
	heard bool // only the transport's one reader touches it
}

func (c *alertConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if !c.heard {
		switch {
		case n > 0:
			c.heard = true
			c.trust.set(nil)
		case isAlert(err):
			c.trust.set(err)
		}
	}
	return n, err
}

// isAlert reports whether the other side ended the TLS handshake with an alert.
func isAlert(err error) bool {
	var op *net.OpError
	return errors.As(err, &op) && op.Op == "remote error"
}
