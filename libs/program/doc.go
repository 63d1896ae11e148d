// Package program is what every service's program has in common: the parts
// that a composition root gives to a service (Env), and Main, which makes them
// from configuration for a program that runs one service of the fleet.
//
// `landfall up` makes an Env for each service by itself and calls the same
// constructors; nothing here knows a service.
package program
