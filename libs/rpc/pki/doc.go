// Package pki makes, stores and reloads the certificates by which Landfall's programs and people know
// each other.
//
// Who somebody is stands in the certificate as a URI ([Identity]): landfall://service/<name>[/<host>]
// or landfall://user/<name>?role=operator. Host names are not what trust rests on: a client checks that
// the server's certificate comes from the installation's CA and names the service (and host) that it
// meant to call; a server takes the caller's identity from the caller's certificate.
//
// [Open] creates an [Authority] in a folder or loads it; [Authority.Ensure] keeps a folder with cert.pem,
// key.pem and ca.pem valid; [Files] serves such a folder to TLS and reads it again when it changes, so
// renewed certificates need no restart.
//
// # Interruptions
//
// Any number of processes may start on one folder at once and be killed at any instruction. Keys and
// the CA certificate are written to a temporary name, synced, and linked to their final name only if
// nothing is there (the loser takes the winner's). Certificates are replaced by rename; a renewal keeps
// the key, so a key and a certificate of different generations cannot stand side by side. What a kill
// can leave is a temporary file, removed an hour later by the next start, or a key without its
// certificate, which the next start completes.
package pki
